"""The modules that a YAML file names."""
