"""Run configurations: one YAML file is one run, read and checked by `configs.loader`."""
