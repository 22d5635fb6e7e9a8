"""Floor 3: what a person sees. The only place that knows the configuration file."""
