"""What every package uses: checks of arguments, atomic writes, tables."""
