"""What an output folder holds besides weights: manifest, journal, evaluation record, and their readers."""
