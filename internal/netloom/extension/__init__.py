"""CloudStack is calling: envelope, placement, SSH and the outcome."""
