"""One opening of a store: which tables and vocabularies it has, and what makes their changes durable."""
