"""Api: turn the bytes of a request into a relay. It owns the routes, the rules for requests, and the documentation
pages."""
