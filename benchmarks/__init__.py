"""Speed and memory of backfire, compared with a plain script that a competent user would write."""
