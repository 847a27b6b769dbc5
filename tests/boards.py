"""4×4 sudoku by brute force."""


def brute_force(board):
    """All solutions by trying every digit in the first blank, rules checked on the coordinates; no table, no bits."""
    if "0" not in board:
        rows = [board[start : start + 4] for start in (0, 4, 8, 12)]
        boxes = [board[start : start + 2] + board[start + 4 : start + 6] for start in (0, 2, 8, 10)]
        return [board] * all(set(unit) == set("1234") for unit in [*rows, *boxes, *zip(*rows, strict=True)])
    cell = board.index("0")
    row, column = divmod(cell, 4)
    seen = {
        board[other]
        for other in range(16)
        if other // 4 == row or other % 4 == column or (other // 8, other % 4 // 2) == (cell // 8, column // 2)
    }
    found = []
    for digit in "1234":
        if digit not in seen:
            found += brute_force(board[:cell] + digit + board[cell + 1 :])
    return found
