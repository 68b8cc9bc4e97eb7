"""Turn films into clips of people with reference photos: `idgrpo ingest`."""
