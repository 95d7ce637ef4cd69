"""Pictures and tables for people: what the other rooms computed, as figures."""
