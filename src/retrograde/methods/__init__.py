"""The methods, one file each: what the method does, its equations, its cost, its source."""
