"""Training: settings, run specification, loop and objective."""
