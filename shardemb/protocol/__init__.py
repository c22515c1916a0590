"""How the partitions of a distributed store commit together: what owners and a coordinator remember, as pure code."""
