"""tpk.parallelize: shard a model that is already there, by a plan of styles."""
