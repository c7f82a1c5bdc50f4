"""Output for people and programs: tables, figures and stock configs."""
