"""Studies: many networks, trained once each, scored and compared, from one declarative file."""
