"""Where a data set's files lie: folders, URLs, and a node's own cache of them."""
