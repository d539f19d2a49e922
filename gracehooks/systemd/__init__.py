"""What the masters say to systemd: when they are ready, which of them it shall follow, how they are."""
