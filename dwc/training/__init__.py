"""Training: settings, the run's specification, the loop and what it minimises."""
