"""Claims of linear, recurrent and hybrid sequence layers."""
