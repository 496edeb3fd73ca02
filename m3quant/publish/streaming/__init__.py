"""Publishing while converting: gates first, finished shards to the staging branch while others are made, everything else at the end."""
