"""A run of training: settings, state, folder, resuming, stopping and what is printed."""
