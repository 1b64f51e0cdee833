"""Text in, tokens out: a corpus becomes pieces, pieces become token shards, shards become batches."""
