"""The two ways of taking a pair's sums: whole arrays in float64, and tiles of float32."""
