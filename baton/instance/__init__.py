"""One instance of the cluster: driver, role behaviours, actor, launcher."""
