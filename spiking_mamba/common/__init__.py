"""What knows no spike: settings, errors, files, the machine, provenance."""
