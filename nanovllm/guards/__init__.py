"""What keeps an engine whole: threads and forks, Ctrl-C, foreign templates."""
