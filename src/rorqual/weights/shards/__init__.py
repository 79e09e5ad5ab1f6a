"""The rank shards of DeepSeek's demo: its configuration, names and cuts, read as one checkpoint."""
