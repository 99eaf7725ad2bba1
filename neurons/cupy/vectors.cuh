// One memory access of VEC neighbouring elements of a storage type (arithmetic.cuh comes before it).

template <class T>
struct alignas(sizeof(typename T::Bits) * VEC < 16 ? sizeof(typename T::Bits) * VEC : 16) Vec {
  typedef typename T::Bits Bits;
  static const int PER_WORD = 4 / sizeof(Bits);
  unsigned word[VEC / PER_WORD];

  DEV float get(int i) const { return T::decode((Bits)(word[i / PER_WORD] >> (i % PER_WORD) * 16)); }
};

template <class T>
struct Pack {                                                     // floats -> words, by the width of T
  static DEV void put(Vec<T>& to, const float* from) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) to.word[i] = T::encode2(from[2 * i], from[2 * i + 1]);
  }
};
template <>
struct Pack<F32> {
  static DEV void put(Vec<F32>& to, const float* from) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) to.word[i] = bits_of(from[i]);
  }
};

// FULL: all VEC elements exist and the address is aligned; otherwise one by one, the first `count` of them.
template <class T, bool FULL>
DEV void load(Vec<T>& to, const typename T::Bits* from, int count) {
  if (FULL) {
    to = *reinterpret_cast<const Vec<T>*>(from);
  } else {
    const int per_word = Vec<T>::PER_WORD;
#pragma unroll
    for (int i = 0; i < VEC / per_word; ++i) to.word[i] = 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < count) to.word[i / per_word] |= (unsigned)from[i] << (i % per_word) * 16;
  }
}

template <class T, bool FULL>
DEV void store(typename T::Bits* to, const float* from, int count) {
  if (FULL) {
    Vec<T> packed;
    Pack<T>::put(packed, from);
    *reinterpret_cast<Vec<T>*>(to) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < count) to[i] = T::encode(from[i]);
  }
}

template <bool FULL>
DEV void load_floats(float* to, const float* from, int count) {
  Vec<F32> packed;
  load<F32, FULL>(packed, reinterpret_cast<const unsigned*>(from), count);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = packed.get(i);
}

template <bool FULL>
DEV void store_floats(float* to, const float* from, int count) {
  store<F32, FULL>(reinterpret_cast<unsigned*>(to), from, count);
}
