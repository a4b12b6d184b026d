"""The decoder, its loss, the VQGAN, and what trains, shards, saves and samples them."""
