// The transforms of winograd_vector.h in one dimension, of vectors of channels or columns: what `kSeen` pixels become,
// and the results that come of as many sums. In two dimensions they go down the columns, then along the rows.
// sana_kernels/conv2d/transforms.py has them as matrices.
#pragma once

#include "conv2d/conv2d_cpu.h"

namespace sana {
namespace {

template <int kernel>
struct TransformShape {
  static constexpr Patches kPatches = patches_of(kernel);
  static constexpr int kSeen = kPatches.seen, kMade = kPatches.made, kStep = kPatches.step;
  static constexpr int kPositions = kSeen * kSeen;
};

// F(4, 3): 4 results with 6 products, of the points 0, a, -a, b, -b and infinity.
struct Winograd4 : TransformShape<6> {
  static constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;
  static void forward(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec even_a = fmadd(set1(-bb), d[2], d[4]), odd_a = set1(a) * fmadd(set1(-bb), d[1], d[3]);
    const Vec even_b = fmadd(set1(-aa), d[2], d[4]), odd_b = set1(b) * fmadd(set1(-aa), d[1], d[3]);
    v[0] = fmadd(set1(aa * bb), d[0], fmadd(set1(-aa - bb), d[2], d[4]));
    v[1] = even_a + odd_a, v[2] = even_a - odd_a;
    v[3] = even_b + odd_b, v[4] = even_b - odd_b;
    v[5] = fmadd(set1(aa * bb), d[1], fmadd(set1(-aa - bb), d[3], d[5]));
  }
  static void back(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = fmadd(set1(a), odd_a, set1(b) * odd_b);
    y[2] = fmadd(set1(aa), even_a, set1(bb) * even_b);
    y[3] = fmadd(set1(a * aa), odd_a, fmadd(set1(b * bb), odd_b, m[5]));
  }
};

// The two pixels that nearest-neighbour upsampling and a kernel of 3 taps make of one, with 3 products: its neighbours'
// differences from it times a tap, and itself times the sum of all taps.
struct Upsampling : TransformShape<3> {
  static void forward(const Vec (&d)[3], Vec (&v)[3]) { v[0] = d[0] - d[1], v[1] = d[1], v[2] = d[2] - d[1]; }
  static void back(const Vec (&m)[3], Vec (&y)[2]) { y[0] = m[0] + m[1], y[1] = m[1] + m[2]; }
};

}  // namespace
}  // namespace sana
