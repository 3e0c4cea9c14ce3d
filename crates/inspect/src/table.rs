//! Columns as Go's `text/tabwriter` aligns them, which istioctl's tables are made with.

/// A table that is filled row by row.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    padding: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With a head, and so many blanks between columns.
    pub(crate) fn new(padding: usize, head: &[&str]) -> Self {
        Self { padding, rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The last cell of a row is not padded.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(&row[..row.len().saturating_sub(1)]) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = String::new();
        for row in &self.rows {
            for (at, cell) in row.iter().enumerate() {
                out.push_str(cell);
                // A column without any text takes no room, not even the blanks.
                if at + 1 < row.len() && widths[at] > 0 {
                    let blanks = widths[at] + self.padding - cell.chars().count();
                    out.extend(std::iter::repeat_n(' ', blanks));
                }
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_column_is_not_padded() {
        let mut table = Table::new(2, &["A", "LONG", "C"]);
        table.row(["aaa".into(), "b".into(), "c".into()]);
        assert_eq!(table.render(), "A    LONG  C\naaa  b     c\n");
    }
}
