def disable_progress_bars():
    pass
