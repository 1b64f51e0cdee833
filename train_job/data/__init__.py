"""Text in, tokens out: what a user named becomes pieces, pieces become token shards, shards become batches."""
