"""What an instance does with an engine when it prefills for others."""
