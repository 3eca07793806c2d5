use super::*;

fn range(start: u64, len: u64) -> PageRange<Iova> {
    PageRange::new(start, len).unwrap()
}

#[test]
fn only_open_pages_are_entered() {
    let window = Window::new(2, 4);
    let four = [Segment { iova: Iova(0x1000), len: 0x4000 }];
    assert_eq!(window.enter(0, &four), Entered::Closed);
    window.open(range(0x1000, 0x4000));
    assert_eq!(window.enter(0, &four), Entered::In);
    assert!(window.overlapping(range(0x4000, 0x1000)) && !window.overlapping(range(0x5000, 0x1000)));
    window.leave(0);
    assert!(window.idle());
}
