"""What every long command shares: progress, clean stops, devices and timelines."""
