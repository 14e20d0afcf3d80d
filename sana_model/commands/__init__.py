"""One module per subcommand of `sana` that is more than a call; `sana_model.cli` parses and dispatches."""
