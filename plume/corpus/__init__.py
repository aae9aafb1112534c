"""A corpus that outgrows one machine: planned in shards, embedded by any number of workers, committed to an index."""
