"""What runs inside supervisord and supervisorctl: no I/O, never blocks, never raises there."""
