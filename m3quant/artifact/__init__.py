"""What lies in an output folder besides weights: manifest, journal, evaluation record, and their readers."""
