"""The commands: compose a configuration, instantiate, call. The only importer of Hydra."""
