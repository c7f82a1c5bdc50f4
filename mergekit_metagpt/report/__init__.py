"""What people and programs are shown: tables, figures, stock configs."""
