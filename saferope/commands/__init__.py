"""The subcommands of `saferope`, one file each."""
