"""How the shipped testbed checkpoints were trained; `infoprune_export.data.train_testbed` is the command."""
