"""What an instance does with an engine when it decodes what others prefilled."""
