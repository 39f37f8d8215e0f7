"""Complete workflows of the commands: a training job, a sweep, a migration."""
