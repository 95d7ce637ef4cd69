"""Studies: train many networks once each, score and compare them, all from one settings file."""
