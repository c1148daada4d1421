r"""Pairs of answers and whether they are equal, from the public conventions of answer checking.

One pair a line, ``reference ### answer``.
"""

EQUAL = r"""
\frac{3}{5} ### 0.6
1/2 ### 0.5
-\frac{1}{2} ### \frac{-1}{2}
\frac{1}{-2} ### -0.5
3\frac{1}{2} ### 7/2
-3\frac12 ### -3.5
2 1/2 ### \frac52
1.5\times10^{3} ### 1500
1.5e3 ### 1500
6.02 \times 10^{23} ### 602000000000000000000000
50\% ### 0.5
50\% ### 50
90^\circ ### 90
90^{\circ} ### 90 degrees
\$1,234.50 ### 1234.5
1{,}234 ### 1234
5\text{ cm} ### 5
5\text{ cm} ### 5 centimeters
5 \text{ meters} ### 5\text{ m}
12\text{ square units} ### 12
3\text{ cm}^2 ### 3 cm^{2}
(1,2) ### \left( 1, 2 \right)
(1, \frac12) ### (1, 0.5)
[0, \infty) ### \left[0,\infty\right)
(-\infty, 3] ### x \le 3
x \in (-\infty, 3] ### (-\infty, 3]
x > 3 ### (3, \infty)
1 < x < 2 ### (1,2)
(1,2) ### 1<x<2
(-\infty, 1) \cup (1, \infty) ### x \ne 1
(-\infty, 1) \cup (1, \infty) ### \mathbb{R} \setminus \{1\}
x<-1 \text{ or } x>1 ### (-\infty,-1)\cup(1,\infty)
(-\infty,-1)\cup(1,\infty) ### (1,\infty)\cup(-\infty,-1)
(-oo, 2) ### (-\infty, 2)
\{1,2,3\} ### \{3,1,2\}
\{1,2\} ### 1,2
1,2 ### 2, 1
1, 2 ### x=1, x=2
1 \text{ and } 2 ### 2 and 1
x = 1 or x = 2 ### 2, 1
\pm 3 ### 3, -3
\pm 3 ### -3, 3
x = \pm 3 ### \pm 3
1 \pm \sqrt{2} ### 1+\sqrt2, 1-\sqrt2
\frac{1 \pm \sqrt{5}}{2} ### \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ### \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ### (1,2)
\begin{pmatrix} 1 \\ \sqrt{4} \end{pmatrix} ### \begin{pmatrix} 1 \\ 2 \end{pmatrix}
x^2 + 2x + 1 ### (x+1)^2
\frac{x^2-1}{x-1} ### x+1
y = 2x + 3 ### 2x+3
y = 2x + 3 ### y - 2x = 3
2x - y + 3 = 0 ### y=2x+3
f(x) = x^2 ### x^2
f(x)=x^2 ### y=x^2
\sqrt{12} ### 2\sqrt{3}
\frac{1}{\sqrt{2}} ### \frac{\sqrt{2}}{2}
\sqrt[3]{8} ### 2
\sqrt[3]{-8} ### -2
\sin 30^\circ ### \frac12
\sin(\pi/6) ### 1/2
\cos^2 x + \sin^2 x ### 1
\log_2 8 ### 3
\ln e^2 ### 2
\log_{10} 1000 ### 3
e^{i\pi} ### -1
(1+i)^2 ### 2i
3-4i ### 3 - 4 i
-4i+3 ### 3-4i
\binom{5}{2} ### 10
5! ### 120
2^{10} ### 1024
2^10 ### 1024
\pi ### 3.14159265358979
\frac{\pi}{2} ### \pi/2
0.\overline{3} ### 1/3
0.1\overline{6} ### 1/6
\text{(A)} ### A
\textbf{(B)} ### B
\mathrm{(C)} ### C
A ### (A)
B ### B. 42 apples
\text{Yes} ### yes
\text{True} ### true
\text{Monday} ### Monday
\boxed{7} ### 7
The answer is \boxed{7}. ### 7
\boxed{\frac{1}{2}} ### 0.5
|x| ### \sqrt{x^2}
\lfloor 3.7 \rfloor ### 3
\lceil 3.2 \rceil ### 4
x=2,y=3 ### (2,3)
x=2, y=3 ### y=3, x=2
(x,y)=(2,3) ### x=2,y=3
(2,3) ### x = 2, y = 3
(1,2),(3,4) ### (3,4),(1,2)
(1,2), (3,4) ### \{(1,2),(3,4)\}
\{(1,2)\} ### (1,2)
3:4 ### 3/4
3:4 ### 6:8
1:2:3 ### 2:4:6
10:30 ### 10:30
1,234,567 ### 1234567
100,200 ### 100, 200
\emptyset ### \varnothing
\emptyset ### \{\}
2\cdot 3^4 ### 162
2 * 3**4 ### 162
2 \times 3 ### 6
x^{-1} ### 1/x
a^2-b^2 ### (a-b)(a+b)
\frac{a}{b} ### a/b
n(n+1)/2 ### \frac{n^2+n}{2}
\frac{n(n+1)}{2} ### \binom{n+1}{2}
\sum_{k=1}^{3} k ### 6
\int_0^1 x dx ### \frac12
\lim_{x\to 0} \frac{\sin x}{x} ### 1
x\leq 5 ### 5\geq x
2x < 6 ### x < 3
-x < 3 ### x > -3
3 > x > 1 ### 1 < x < 3
x \neq 2 ### x \ne 2
\text{no solution} ### No solution
10^{20} ### 100000000000000000000
0 ### -0
0.0 ### 0
.5 ### 0.5
5. ### 5
1\,000\,000 ### 1000000
1\ 000 ### 1000
\tan^{-1}(1) ### \frac{\pi}{4}
\arctan 1 ### \frac{\pi}{4}
2\pi r h ### 2 \pi h r
\theta ### \theta
\frac{\sqrt{3}}{3} ### \frac{1}{\sqrt{3}}
\frac12\sqrt3 ### \frac{\sqrt3}{2}
\frac{1}{2}x ### \frac{x}{2}
7 \mathrm{~cm} ### 7
7 \mathrm{~kg} ### 7\text{ kg}
25 \text{ cents} ### 25
\text{5 apples} ### 5
15 \text{ mph} ### 15
6 \frac{2}{3} ### \frac{20}{3}
x=5 ### 5
5 ### x = 5
AB = 12 ### 12
x_1 = 2, x_2 = 3 ### 3, 2
k=\frac{1}{3} ### \frac{1}{3}
\angle ABC = 60^\circ ### 60
60 ### 60^\circ
\log 2 + \log 3 ### \log 6
2^{\frac{3}{2}} ### 2\sqrt{2}
e^{-x} ### \frac{1}{e^x}
\exp(2) ### e^2
\sec x ### \frac{1}{\cos x}
4x^3-x ### x(4x^2-1)
x^5-x^2+4x+C ### C + 4x + x^5 - x^2
\left\{-2, 2\right\} ### \pm 2
-2, 2 ### \pm2
1+\frac{1}{1+\frac{1}{2}} ### \frac{5}{3}
\text{even} ### Even
6 \text{ and } 8 ### 6, 8
\frac{7}{3} \approx 2.33 ### 7/3
8\% ### 0.08
0.08 ### 8 percent
\mathbf{v} = (1,2) ### (1,2)
\langle 1,2,3 \rangle ### (1,2,3)
\overline{AB} ### \overline{AB}
12\text{ hours} ### 12 hours
3\text{ hr} ### 3 hours
1\text{ inch} ### 1\text{ inches}
12 \text{ inches} ### 12 in
-1 \le x \le 1 ### [-1, 1]
[-1,1] ### x \in [-1,1]
t > 0 ### (0,\infty)
(0, 1] \cup [2, 3) ### [2,3)\cup(0,1]
(1,3) \cap (2,4) ### (2,3)
(0,1) \cup [1,2) ### (0,2)
\{x \mid x > 3\} ### (3,\infty)
\{x : x > 3\} ### x>3
\begin{cases} x = 1 \\ y = 2 \end{cases} ### x=1, y=2
\begin{array}{l} x=1 \\ y=2 \end{array} ### (1,2)
2x+3y=6 ### 4x+6y=12
x^2+y^2=25 ### y^2 + x^2 - 25 = 0
(x-1)^2+(y+2)^2=9 ### x^2-2x+y^2+4y-4=0
11_{2} ### 11_2
\text{C} ### C
1/3 ### 0.3333333333
\sqrt{2} ### 1.414213562
\sqrt{2}\approx 1.41 ### \sqrt2
10 ### 10 dollars
\$10 ### 10
10\text{ dollars} ### \$10
\frac{2}{4} ### \frac12
7.50 ### 7.5
1e3 ### 1000
2\text{ kg} ### 2 kg
5\text{ m} ### 5 m
1,234 ### 1234
0,25 ### 0.25
]0,1[ ### (0,1)
\frac{\pi}{3}+2\pi k ### 2\pi k+\frac{\pi}{3}
\mathbb{R} ### (-\infty,\infty)
(-\infty,2)\cup(2,\infty) ### \{x \mid x \ne 2\}
x\ge 2 \text{ and } x \le 5 ### [2,5]
I(0)e^{-t} ### e^{-t}I(0)
2^{99^{99}} ### 2^{ 99^{99} }
\tan x ### \frac{\sin x}{\cos x}
\sin 2x ### 2\sin x\cos x
\ln(ab) ### \ln a+\ln b
sqrt(2)/2 ### \frac{\sqrt2}{2}
2*pi ### 2π
x² ### x^2
3 × 4 ### 12
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] ### \begin{pmatrix}1&2\\3&4\end{pmatrix}
\textbf{(B)}\ 17 ### B
90^\circ ### \frac{\pi}{2}
3,\! 000 ### 3000
\{x | -1 < x \le 2\} ### (-1,2]
a=1,b=2,c=3 ### (1,2,3)
x+2y=6 ### y=-\frac{1}{2}x+3
|x|<2 ### 2>|x|
"""

UNEQUAL = r"""
5 ### 5,6,7,8
5 ### 5\text{ or }6
5 ### 5)
12:00 ### 3:00
10^{20} ### 10^{20}+1
10^{100} ### 10^{100}+1
1/2004! ### 1/2006!
2^{-99} ### 2^{-98}
1-1/\mathrm e ### 1+1/\mathrm e
ABC ### BCA
10_2 ### 10
1e-7 ### 2e-7
5 apples ### 5 oranges
(1,3) ### \{1,3\}
100000! ### 1
5 cm ### 5 kg
3 ### 3.0001
\pi ### 3.14
\sqrt2 ### 1.41
\pi ### 22/7
(1,2) ### (2,1)
[1,2] ### (1,2)
(1,2) ### [1,2)
\{1,2\} ### \{1,2,3\}
1,2 ### 1
1 ### 1,2
1,2,3 ### 1,2
x<1 ### x \le 1
x<1 ### x>1
(-\infty,1) ### (-\infty,1]
\pm 3 ### 3
3 ### \pm 3
1\pm\sqrt2 ### 1+\sqrt2
x=1 ### y=1
x=1 ### x=-1
2x+z=1 ### 1
x+y=5 ### 5
a\cdot b=0 ### a^2 b^2=0
x^2+1 ### x^2-1
\sqrt{x^2} ### x
x ### |x|
\sin x ### \cos x
\frac{1}{x} ### x
2i ### 2
3+4i ### 3-4i
A ### B
A ### AB
A ### (A)(B)
\text{yes} ### \text{no}
odd ### even
\begin{pmatrix}1&2\\3&4\end{pmatrix} ### \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ### \begin{pmatrix}2\\1\end{pmatrix}
2 ### [2]
2 ### \{2\}
1:2 ### 2:1
1:2:3 ### 1:2:4
50\% ### 5
0.5 ### 5\%
1,234 ### 1,235
1000 ### 100
9^{9^{9^{9}}} ### 1
(10^{9})! ### 1
x^2=4 ### x=2
y=2x ### y=3x
y=2x+3 ### 2x+4
f(x)=x^2 ### g(x)=x^2
e ### 2.718
2^{1000} ### 2^{1001}
\frac{1}{0} ### 1
\frac{1}{0} ### \infty
\infty ### -\infty
\emptyset ### 0
\{0\} ### \emptyset
2\frac{1}{2} ### 1
12 ### 1,2
\boxed{} ### 1
(3\cdot10^7)!-1 ### (3\cdot10^7)!
x^2 ### 2x
x_1 ### x_2
\alpha ### \beta
ab ### a+b
\text{Monday} ### \text{Tuesday}
30^\circ ### 60^\circ
\sin 30 ### \frac12
0.999999 ### 1
1 ### 0.9999999999
0.123456 ### 0.123457
\log_2 3 ### \log_3 2
(0,1) \cup (1,2) ### (0,2)
x \ne 1 ### x = 1
\mathbb{R} ### \mathbb{Z}
\mathbb{R} ### (0,\infty)
\{1,1,2\} ### \{1,3\}
2,2,3 ### 2,3,3
5 ### 5+0.0000001
100 ### 100\text{ and }200
x=2, y=3 ### x=3, y=2
(2,3) ### x=3,y=2
1 ### e^{-200}+1
1 ### e^{-2000}+1
5 ### five hundred
\text{none} ### \text{all}
7 ### 7^2
2(x+1) ### 2x+1
1/(2x) ### x/2
(a,b) ### (b,a)
AB ### BA
10 \text{ m} ### 10\text{ m}^2
10 \text{ m/s} ### 10 \text{ m}
3 ### the answer is not 3
3 ### 13
x > 3 ### [3,\infty)
f'(x) ### f(x)
n! ### n
\frac{d}{dx} x^2 ### x^2
\int_0^1 x dx ### 1
\sum_{k=1}^3 k ### 5
0,25 ### 0.26
]0,1[ ### [0,1]
I(0)e^{-t} ### 0
12 ### 1 2
\frac{1}{2} ### \frac{1}{3}
7 ### -7
3:5 ### 5:3
\sin 2x ### 2\sin x
2^{10} ### 2^{11}
x^2+y^2=1 ### x^2+y^2=2
x>0 ### x<0
[0,1] ### [0,2]
5\% ### 5.5\%
\$10 ### \$100
10\text{ cm} ### 10\text{ mm}
\frac{\sqrt3}{2} ### 0.8660
a ### b
\text{Thursday} ### \text{Tuesday}
90^\circ ### \pi
\textbf{(B)}\ 17 ### C
\begin{array}{cc}1&2\\3&4\end{array} ### \begin{pmatrix}1&2\\3&5\end{pmatrix}
\{x | -1 < x \le 2\} ### [-1,2]
"""


def pairs(block: str) -> list[tuple[str, str]]:
    """The (reference, answer) pairs of a block of lines."""
    return [tuple(line.split(" ### ")) for line in block.strip().splitlines()]
