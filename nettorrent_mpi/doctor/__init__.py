"""The command `nettorrent doctor`: whether a training would run here, and what to mend where it would not."""
