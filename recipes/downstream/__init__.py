"""What the commands that use a trained encoder share: encoders, labeled sets, protocols."""
