"""From files to batches: readers, phantoms, record sources, elastic streams (numpy only)."""
