"""States that outlive their host: sealed, in a store that several servers share."""
