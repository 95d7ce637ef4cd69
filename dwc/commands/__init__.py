"""The commands, one file each, named as in `dwc.cli.COMMANDS`: they read arguments and call one workflow."""
